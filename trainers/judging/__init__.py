"""Reward models measured on preference files, and win rates of two models; it trains nothing."""
