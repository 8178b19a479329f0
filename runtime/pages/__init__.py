"""What pages for people are made of: HTML, charts, and what a run folder holds. Only text is made here."""
