"""Settings of nbgrader, for this folder or for a teacher's own with this file and a copy of solutions/."""

c = get_config()
c.CourseDirectory.course_id = "kvlearn"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
# Checks and known mistakes lie beside each source notebook: only the notebook is released.
c.CourseDirectory.ignore = [".ipynb_checkpoints", "__pycache__", "feedback", "*.py", "*.pyc"]
