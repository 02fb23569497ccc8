"Damaged and hostile inputs, drawn from a seed: each has to end in success or in a clear error, soon and in little memory."
