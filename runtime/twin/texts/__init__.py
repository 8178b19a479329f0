"""From an author's files to cleaned works and passages: readers, boilerplate, chapters, copies, the held-out part."""
