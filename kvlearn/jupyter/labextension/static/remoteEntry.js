// Gives images in JupyterLab the alt text of their output's metadata, which its own renderer does not read.
//
// A figure's output is {"data": {"image/png": ...}, "metadata": {"image/png": {"alt": "..."}}}: so the drawing is
// stored once, and GitHub and nbconvert show it as they show any image. This file is the extension as JupyterLab
// loads it (a module federation container), small enough to need no build.
(() => {
  let shared;

  // JupyterLab's own copy of a package.
  const load = async (name) => {
    const versions = Object.values(shared[name]);
    const version = versions.find((each) => each.loaded) ?? versions[0];
    return (await version.get())();
  };

  const describe = (host, metadata) => {
    if (typeof metadata?.alt !== "string") return;
    for (const image of host.querySelectorAll("img")) image.alt = metadata.alt;
  };

  const extension = ({ imageRendererFactory }) => ({
    id: "kvlearn:alt-text",
    rank: imageRendererFactory.defaultRank,
    rendererFactory: {
      ...imageRendererFactory,
      createRenderer: (options) => {
        const renderer = imageRendererFactory.createRenderer(options);
        const render = renderer.render.bind(renderer);
        renderer.render = async (model) => {
          await render(model);
          describe(renderer.node, model.metadata[options.mimeType]);
        };
        return renderer;
      },
    },
  });

  (window._JUPYTERLAB ??= {}).kvlearn = {
    init: (scope) => {
      shared = scope;
    },
    get: async () => {
      const module = { default: extension(await load("@jupyterlab/rendermime")) };
      return () => module;
    },
  };
})();
