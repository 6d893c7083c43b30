"""What the prompts are trained on: records from files, and the order and shape in which a run sees them."""
