"""The layers that a block is made of, and what stands after the last one: each cut over the groups it is handed."""
