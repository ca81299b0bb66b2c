"""What gradients say about the batch size: estimators without communication."""
