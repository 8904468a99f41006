/* Stands for libnvinfer, libnvinfer_plugin and libnvonnxparser under TensorRT's Python bindings, which need their symbols
 * to load. The plugin registry is the real one, of the lean runtime that the first of them links. */
void* createInferBuilder_INTERNAL(void* logger, int version) { return (void)logger, (void)version, (void*)0; }
void* getBuilderPluginRegistry(int capability) { return (void)capability, (void*)0; }
int initLibNvInferPlugins(void* logger, const char* name) { return (void)logger, (void)name, 1; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) {
  return (void)network, (void)logger, (void)version, (void*)0;
}
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) {
  return (void)refitter, (void)logger, (void)version, (void*)0;
}
int getNvOnnxParserVersion(void) { return 110000; }
