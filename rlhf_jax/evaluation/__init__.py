"""How good a model is: held-out metrics, intervals and calibration."""
