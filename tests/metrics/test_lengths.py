from treepo_async.metrics.lengths import LengthSums


def test_the_means_are_of_all_trajectories_together_and_not_of_trees():
    sums = LengthSums(18, 3, 5.0, 1.0) + LengthSums(6, 2, 3.0, 1.0)
    assert (sums.delivered, sums.unbiased) == (24 / 5, 4.0)


def test_without_a_trajectory_there_is_no_mean():
    assert (LengthSums().delivered, LengthSums().unbiased) == (None, None)
