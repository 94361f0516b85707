"""Over the steps of a sequence: penalties, advantages and the losses made of them."""
