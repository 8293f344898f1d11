// The course's part of JupyterLab's page: alt text of figures, and windows that are narrow.
//
// This file is the extension as JupyterLab loads it (a module federation container), short enough to need no build.
(() => {
  const NARROW = "(max-width: 900px)";
  let shared;

  // JupyterLab's own copy of a package.
  const load = async (name) => {
    const versions = Object.values(shared[name]);
    const version = versions.find((each) => each.loaded) ?? versions[0];
    return (await version.get())();
  };

  // JupyterLab's renderer of images does not read the alt text in their output's metadata. There it is stored once
  // and beside the drawing, {"data": {"image/png": ...}, "metadata": {"image/png": {"alt": "..."}}}, and every other
  // reader of notebooks still finds an ordinary image.
  const altText = async () => {
    const { imageRendererFactory } = await load("@jupyterlab/rendermime");
    const createRenderer = (options) => {
      const renderer = imageRendererFactory.createRenderer(options);
      const render = renderer.render.bind(renderer);
      renderer.render = async (model) => {
        await render(model);
        const alt = model.metadata[options.mimeType]?.alt;
        if (typeof alt !== "string") return;
        for (const image of renderer.node.querySelectorAll("img")) image.alt = alt;
      };
      return renderer;
    };
    return {
      id: "kvlearn:alt-text",
      rank: imageRendererFactory.defaultRank,
      rendererFactory: { ...imageRendererFactory, createRenderer },
    };
  };

  // In a narrow window the file browser makes room for the notebook, text that is laid out in columns scrolls instead
  // of breaking its lines anywhere, and so do the score's sentences (what was expected, what came).
  const narrowWindows = () => ({
    id: "kvlearn:narrow-windows",
    autoStart: true,
    activate: (app) => {
      const style = document.createElement("style");
      style.textContent = `@media ${NARROW} {
        .jp-OutputArea .jp-RenderedText pre { white-space: pre; word-break: normal; overflow-x: auto; }
        .kvlearn-score td:nth-child(n + 4) { min-width: 12em; }
      }`;
      document.head.append(style);
      const narrow = window.matchMedia(NARROW);
      const makeRoom = () => narrow.matches && app.shell.collapseLeft?.();
      app.restored.then(makeRoom);
      narrow.addEventListener("change", makeRoom);
    },
  });

  const modules = { "./mimeExtension": altText, "./extension": narrowWindows };

  (window._JUPYTERLAB ??= {}).kvlearn = {
    init: (scope) => {
      shared = scope;
    },
    get: async (name) => {
      const module = { __esModule: true, default: await modules[name]() };
      return () => module;
    },
  };
})();
