"""What a model is worth: held-out metrics, intervals and calibration."""
