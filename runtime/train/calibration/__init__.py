"""What `trimaran calibrate` times on its ranks: products, copies, attention, small steps, and exchanges."""
