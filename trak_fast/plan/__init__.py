"""`trak-fast plan`: predicts time, memory and disk of a run. job.py describes the run, rates.py has the speed of a
machine, predict.py computes the prediction."""
