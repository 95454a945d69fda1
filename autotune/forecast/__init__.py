"""Where a loss curve is going: a fit, its interval, and an explicit refusal."""
