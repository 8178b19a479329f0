"""A twin that is asked and measured: its ranks, its answers with what they rest on, its report."""
