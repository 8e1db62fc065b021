"""What a run shows of itself: text, curves, a page, trackers."""
