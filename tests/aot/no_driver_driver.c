/* A libcuda.so.1 as an old driver might be: without any of the functions a launch needs. */
int cuNothing(void);
int cuNothing(void) { return 0; }
