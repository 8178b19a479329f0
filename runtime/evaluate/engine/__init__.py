"""The scoring engine: likelihoods and continuations of many requests by dp replicas of tp x pp ranks."""
