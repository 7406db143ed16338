"""How model families write tool calls: one file for each way."""
