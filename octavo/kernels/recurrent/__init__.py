"""Time steps of INT8 LSTM and GRU layers."""
