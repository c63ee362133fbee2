"""All that knows PEFT's attribute names."""
