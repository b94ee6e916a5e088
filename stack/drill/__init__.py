"""Fire drill: does the stack that is running page somebody when a run goes bad?"""
