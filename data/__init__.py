# Makes data/ a package of this project, so that an installed package of the same name cannot take its place.
