/** What a command may touch besides the kernel, so that tests run the real thing. */
export interface Environment {
	readonly stdout: (text: string) => void;
	readonly stderr: (text: string) => void;
	readonly signal: AbortSignal;
}
