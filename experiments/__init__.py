"""What the parts buy, what a step costs, a peer beside it, and a check of kept weights: run each with `python -m`."""
