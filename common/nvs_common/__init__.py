"""What every view-synthesis system here shares: cameras, sampling, data, training, evaluation."""
