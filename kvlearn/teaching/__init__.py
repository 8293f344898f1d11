"""What exercises give a learner to work with. An answer may call all of it: no exercise asks for it."""
