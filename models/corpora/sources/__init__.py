"""Where the recordings and voices come from: the packages, what they hold, and how they are read."""
