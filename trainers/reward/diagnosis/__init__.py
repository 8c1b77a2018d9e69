"""Reports on preference data and on reward models; it trains nothing."""
