/** Agents of several versions. */
import {fileURLToPath} from 'node:url';
import {Running} from './process.js';
import {Agent, type World} from './world.js';

const CHILD = fileURLToPath(new URL('agent-child.js', import.meta.url));

/** The agent of a version with that layout, ready. It finds the world's pods file. */
export async function startVersion(world: World, layout: number): Promise<Agent> {
	const running = Running.start(world.program('in'), ['--cgroup', world.cgroup, '--', process.execPath, CHILD, String(layout), world.podsFile, world.bpffs, world.cgroup, world.node.netns]);
	world.onEnd(async () => {
		await running.stop('SIGKILL');
	});
	const agent = new Agent(running);
	await agent.ready();
	return agent;
}
