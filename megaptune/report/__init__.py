"""What `megaptune report` writes over one or more runs: tables beside the paper's, plots, and the figures as CSV."""
