"""Fire drill: does the running stack page somebody when a run goes bad?"""
