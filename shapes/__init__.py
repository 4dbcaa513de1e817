"""What a net's forward pass did, held to a plan: the trace, the table of both, and the doctor."""
