{
  "targets": [
    {
      "target_name": "sidestep",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake-js",
          "inputs": ["CMakeLists.txt"],
          "outputs": ["build/Release/sidestep.node"],
          "action": ["npx", "--no-install", "cmake-js", "build"]
        }
      ]
    }
  ]
}
