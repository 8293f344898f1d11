"""Tools that exercises give a learner. An answer may call all of them: no exercise asks for them."""
