"""The replay queue: prompt leases, admission by staleness, and the trees on their way to the learner."""
