"""`trak-fast plan`: predicts time, memory and disk of a run. job.py says what runs, rates.py how fast this machine is,
predict.py what follows."""
