// What the model can draw, said in prompts to click.

/** For the bundled model, which knows shapes, colours, sizes, places and backgrounds. */
const BUNDLED = {
  words:
    "fluxd-demo came with the service, so that there is something to draw with at once. It knows shapes: " +
    "circles, squares, triangles, stars, hearts, arrows and the like, in twelve colours, three sizes and nine " +
    "places, beside, above, inside or behind one another, on plain, gradient, striped or checked backgrounds. " +
    "It draws no photographs.",
  prompts: [
    "a large yellow star on a gradient from purple to orange",
    "a blue star to the left of a yellow heart",
    "a small red circle inside a large green square",
    "a pink heart with a black outline on a cyan background",
    "an orange moon at the top right on a black background",
    "a white arrow on blue and white stripes",
  ],
};

const ANY = {
  words: "Describe what should be in the picture, how it looks and in which light.",
  prompts: [
    "a red fox asleep in fresh snow, soft morning light, shallow depth of field",
    "a still life of lemons in a blue ceramic bowl, oil on canvas",
    "an isometric cutaway of a tiny bookshop at night, warm windows",
    "a poster of a sailing boat, three flat colours, the word HORIZON in large letters",
  ],
};

/** Prompts that change a picture, for when there is a reference. */
export const BUNDLED_EDITS = ["make it blue", "put it on a yellow background", "add a green star", "move it to the top left"];

export const examplesFor = (isBundled) => (isBundled ? BUNDLED : ANY);
