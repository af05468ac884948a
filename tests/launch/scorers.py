"""Scorers of a user, good and bad."""

import time


def length(response, _answer):
    return min(1.0, len(response) / 100)


def moody(_response, answer):
    if answer == "raise":
        raise RuntimeError("not in the mood")
    if answer == "hang":
        time.sleep(3600)
    return 1.0
