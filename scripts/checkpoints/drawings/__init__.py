"""Where the training pictures come from: packages and licences, concepts and names, rendering, restyling."""
