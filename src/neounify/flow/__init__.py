"""Flow matching in pixel space: the only copy of each rule. t = 0 is noise, t = 1 is data."""
