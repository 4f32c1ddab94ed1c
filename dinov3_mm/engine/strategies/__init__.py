"""FlexibleRunner strategies: one process or DDP, fully sharded, several students."""
