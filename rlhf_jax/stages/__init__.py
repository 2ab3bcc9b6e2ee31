"""One file a stage: data, loss, loop, evaluation. `chain` runs a stage after its parents."""
