"""The commands, and what the parts buy, what a step costs, a peer, and a check of kept weights."""
