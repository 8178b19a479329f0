"""The search's processes: the tuner, its workers, and what people see of them."""
