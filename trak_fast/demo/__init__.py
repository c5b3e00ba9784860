"""`trak-fast demo`: attribution on handwritten digits, checked against retraining. digits.py has data and nets, run.py
the demonstration, results.py its figures, page.py the files with them."""
