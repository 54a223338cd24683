"""Errors, atomic files, typed results, progress and facts about this machine."""
