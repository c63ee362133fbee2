"""The only folder that knows PEFT: what its modules hold, and whether other tools have replaced a part of them."""
