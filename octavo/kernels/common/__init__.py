"""What operators share: epilogue, convolution geometry, quantized values, packed weights."""
