"""What a run reads of its token shards: which sample comes when, from which corpus, and what is predicted of it."""
