"""How the trained modules lie on processes: replicated, FSDP2, ZeRO-3."""
