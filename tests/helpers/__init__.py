"""What tests share: models, operands, formulas, a local Hub."""
